"""Other people's systems on the same items: each in its own environment or behind its own server, none imitated."""
