"""What every room stands on and none is about: files, what makes long work go on after a kill, processes, progress bars, keys, HTTP, memory limits."""
