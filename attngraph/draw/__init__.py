"""Pictures of graphs and of attention."""

from attngraph.draw.pictures import BLUE, attention, connectivity, messages, receptive_field, save

__all__ = ["BLUE", "attention", "connectivity", "messages", "receptive_field", "save"]
