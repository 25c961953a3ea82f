"""Running experiments: in this process, or as a process for each peer."""
