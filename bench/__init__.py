"""What whisperd costs, measured: `python -m bench` prints a table. No test measures time; here nothing is tested."""
