"""Peers on several machines: started, watched and collected over SSH."""
