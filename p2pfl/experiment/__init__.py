"""The experiment file: sections, what fits together, and what is built of it."""
