"""Files that a diffusers folder carries as they are; they import nothing of largescale."""
