"""Who hears whom: graphs as values, and their algebra. Nothing here knows a kernel, a device or a model."""
