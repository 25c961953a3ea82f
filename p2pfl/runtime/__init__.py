"""The three drivers of one algorithm: a simulator, an emulator and a server."""
