"""What every experiment needs and no experiment changes: devices, processes, folders, checkpoints, command line."""
