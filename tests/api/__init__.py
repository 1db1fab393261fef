"""Tests of app/api, over real sockets where the claim is about them."""
