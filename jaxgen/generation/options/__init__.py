"""What is asked: the table of options, their checks and defaults, and what is refused."""
