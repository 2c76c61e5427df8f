"""Settings: the JSON that SGLang passes on, parsed once into frozen objects; strict.

A module that uses a setting gets it as an argument; nothing here opens a file or a connection.
"""
