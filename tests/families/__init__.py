"""Tests of app/families."""
