"""The engine in a world we control: a device, a memory and a clock that are only integers."""
