"""Tests of what happens when a client leaves."""
