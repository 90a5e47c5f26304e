"""One run: the stream of tasks in ``runner``, what it is put together from, and what may stop it."""
