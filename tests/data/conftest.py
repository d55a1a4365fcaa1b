"""Programs that write stored data need packages that the tests do not have."""

collect_ignore = ["strategies.py"]
