"""Pages of other machines: a rank process's side, and the agent."""
