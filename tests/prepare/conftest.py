import pytest

from tests.support.small_data import small_fields


@pytest.fixture
def fields():
    return small_fields()


@pytest.fixture
def files(fields, tmp_path):
    """The folder with these fields, a file a year."""
    folder = tmp_path / "in"
    folder.mkdir()
    for year, part in fields.groupby("time.year"):
        part.to_netcdf(folder / f"{year}.nc")
    return folder
