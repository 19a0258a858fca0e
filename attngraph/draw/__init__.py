"""Pictures of graphs and of attention."""

from attngraph.draw.pictures import attention, connectivity, messages, receptive_field, save

__all__ = ["attention", "connectivity", "messages", "receptive_field", "save"]
