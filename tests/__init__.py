"""The tests mirror app/, same names."""
