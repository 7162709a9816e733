"""The report: a results folder as one HTML page, Markdown, plots and tables that readers other than its authors can check."""
