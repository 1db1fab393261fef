"""Tests of app/pool."""
