"""An OpenAI-compatible proxy that defends every picture and question (`davsp serve`), and a server of one model (`davsp serve-model`)."""
