"""Parts of the optimizer study: its plan, its runs, its statistics, its table and its picture."""
