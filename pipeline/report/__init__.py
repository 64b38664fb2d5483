"""The report: recorded evaluations as the paper's tables, beside the paper's own numbers."""
