package db

import (
	"bytes"
	"io"
)

// rowCounter counts the bytes and the rows of a COPY in text form: a line each, since line feeds in values are escaped.
type rowCounter struct {
	w        io.Writer
	rows     int64
	bytes    int64
	progress func(rows int64)
}

func (c *rowCounter) Write(b []byte) (int, error) {
	n, err := c.w.Write(b)
	c.bytes += int64(n)
	c.rows += int64(bytes.Count(b[:n], []byte{'\n'}))
	if c.progress != nil {
		c.progress(c.rows)
	}
	return n, err
}

// A rowWriter shows each row of a COPY before it goes on: pgx writes each message of the server's as one.
type rowWriter struct {
	w   io.Writer
	see func(row []byte) // nil: nobody looks
}

func (r rowWriter) Write(row []byte) (int, error) {
	if r.see != nil {
		r.see(row)
	}
	return r.w.Write(row)
}
