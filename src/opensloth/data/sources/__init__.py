"""Where rows come from: files, folders, hub data sets, made problems. `open.open_source` finds the right one."""
