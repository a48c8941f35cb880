package db

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
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

// copyBuffer is between the COPY streams: the server sends a message a row, and without it each would be a write.
const copyBuffer = 256 << 10

// A rowStream is the rows of a query on one connection, on their way to others.
type rowStream struct {
	counter *rowCounter // of what has gone; it is whole once the stream is closed
	pipe    *io.PipeReader
	rows    *bufio.Reader
	taken   int64      // rows that a receiver has taken
	read    chan error // how the reading ended
}

// openRows begins to read. see, unless nil, is given each row: the server sends each in a message of its own. The stream must be closed.
func openRows(ctx context.Context, from *pgconn.PgConn, sql string, counter *rowCounter, see func(row []byte)) *rowStream {
	r, w := io.Pipe()
	counter.w = w
	s := &rowStream{counter: counter, pipe: r, rows: bufio.NewReaderSize(r, copyBuffer), read: make(chan error, 1)}
	go func() {
		out := bufio.NewWriterSize(counter, copyBuffer)
		_, err := from.CopyTo(ctx, rowWriter{out, see}, "COPY ("+sql+") TO STDOUT")
		if err == nil {
			err = out.Flush()
		}
		_ = w.CloseWithError(err) // never fails
		s.read <- err
	}()
	return s
}

// copyPart sends rows into a table of another connection: all, or, from until on, no more. It says whether there are more. The zero
// time: all.
func (s *rowStream) copyPart(ctx context.Context, to *pgconn.PgConn, into string, until time.Time) (more bool, err error) {
	part := &rowPart{rows: s.rows, until: until}
	taken, err := to.CopyFrom(ctx, part, "COPY "+into+" FROM STDIN")
	s.taken += taken.RowsAffected()
	if err != nil || !part.over {
		return false, err
	}
	if _, err := s.rows.Peek(1); err != nil {
		return false, endOf(err)
	}
	return true, nil
}

// endOf gives nil for the end of what is read.
func endOf(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// close ends the reading, where it has not ended, and gives what went wrong first; err is what the writing ended with.
func (s *rowStream) close(err error) error {
	_ = s.pipe.CloseWithError(errGaveUp) // never fails
	// Where the reading side failed, the writing side says only that its input broke.
	if readErr := <-s.read; readErr != nil && !errors.Is(readErr, errGaveUp) {
		return mapError(readErr)
	}
	return mapError(err)
}

// errGaveUp ends the reading side where the writing one failed.
var errGaveUp = errors.New("the receiver gave up")

// A rowPart reads whole rows, and ends once its time is over, not before the first.
type rowPart struct {
	rows  *bufio.Reader
	until time.Time
	over  bool
}

func (p *rowPart) Read(b []byte) (int, error) {
	if p.over {
		return 0, io.EOF
	}
	if _, err := p.rows.Peek(1); err != nil {
		return 0, err
	}
	chunk, err := p.rows.Peek(min(len(b), p.rows.Buffered()))
	if err != nil {
		return 0, err
	}
	if !p.until.IsZero() && !time.Now().Before(p.until) {
		if i := bytes.IndexByte(chunk, '\n'); i >= 0 {
			chunk, p.over = chunk[:i+1], true
		}
	}
	return p.rows.Discard(copy(b, chunk))
}
