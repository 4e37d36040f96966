"""What is known of the air without a network: its climatology and persistence."""
