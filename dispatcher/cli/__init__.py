"""The two command lines: `dispatcher` for the operator, `trackpost` for the customer."""
