"""Tests: bytes first, then rooms, then whole daemons."""
