"""From measurements and other people's files to data sets that training reads."""
