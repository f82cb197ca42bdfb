"""`davsp reproduce gate`: a border that is looked through, beside the border itself, ECSO, and looks that need no border."""
