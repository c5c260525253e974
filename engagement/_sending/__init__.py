"""The transport's side: runs its calls beside the worker."""
