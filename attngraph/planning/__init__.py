"""What runs where, and why: one contract for backends, and the planner that asks them."""
