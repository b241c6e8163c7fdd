"""`python -m examples.with_data_parts prepare FILE`: main.py, with data parts of your own.

A prepare file has no `imports`; a script that imports the parts and then is main.py does the same. Workers import the
script, too, so the parts must be imported on top, and the call must stand below `if __name__ == "__main__"`.
"""

from examples import csv_source, letters_filter, serial_executor, word_tokenizer  # noqa: F401 (they register)
from main import app

if __name__ == "__main__":
    app()
