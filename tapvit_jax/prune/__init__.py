"""Units, costs, budgets, masks and physical reshaping."""
