"""Hours of bad luck for whisperd, by a seed that repeats them, and a report of what was tried and what was lost."""
