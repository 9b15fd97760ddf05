"""The client for asyncio: the same surface, awaited."""
