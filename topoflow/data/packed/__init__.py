"""Packed data: a gridded data set laid out for reading samples, in plain arrays with a manifest.

OUT/manifest.json says what the files are and has its own hash; OUT/lat2d.npy and so on are the fields that do not
change; OUT/fields_YYYY.npy is a year, [time, variable, row, column]; OUT/year_YYYY.json has hash and moments of each of
its days. Anyone can read the arrays with numpy.load.
"""
