"""What every room stands on and none is about: files, processes, progress bars, keys, HTTP, memory limits."""
