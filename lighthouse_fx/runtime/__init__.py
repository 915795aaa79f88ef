"""What holds while a program runs: the stage, the documents, guards, and the wrappers around compiled graphs."""
