"""Tests of the page at `/` in a real Chromium, where it is found as a person finds it: by roles, labels and words."""
