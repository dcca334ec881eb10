"""One HTML file that tells what a run or a demo showed: `bcr.report` puts it together from the rooms in here."""
