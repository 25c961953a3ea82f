"""What a run leaves behind: its folder, its models, tables and plots."""
