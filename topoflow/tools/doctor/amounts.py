"""Numbers with units, as people read them."""


def show_bytes(count: float) -> str:
    """1234567 is "1.2 MB"."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 999.5 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.0f} {units[0]}" if units[0] == "B" or count >= 99.5 else f"{count:.2g} {units[0]}"


def show_rate(bytes_per_second: float) -> str:
    """Bytes in a second."""
    return f"{show_bytes(bytes_per_second)}/s"


def show_seconds(seconds: float) -> str:
    """0.0123 is "12 ms"."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
