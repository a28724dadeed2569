"""Changes to whole models: convert, recalibrate, fold, export."""
