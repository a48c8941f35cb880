package smtpd

import (
	"bufio"
	"bytes"
	"io"
	"os"
	"sync"
	"syscall"
)

// roomStep is how many octets of a file are written between two looks at the room that is left.
const roomStep = 1 << 20

// memoryBound is how much of a message is held in memory; the rest goes to a file.
const memoryBound = 256 << 10

var memories = sync.Pool{New: func() any { b := make([]byte, 0, 16<<10); return &b }}

// A content is one message: its first 256 KiB in memory, the rest in a file that has no name. Written first and read then, it is
// a mail.Content. It must be released.
type content struct {
	dir   string
	free  int64 // octets to be left free there
	next  int64 // extra at which to look again
	mem   *[]byte
	file  *os.File
	late  *bufio.Writer // to file
	extra int64         // octets in file
}

// newContent makes an empty one. dir is where its file lies, on whose file system minFree octets are left free.
func newContent(dir string, minFree int64) *content {
	return &content{dir: dir, free: minFree, mem: memories.Get().(*[]byte)}
}

// room looks, now and then, whether there is enough for more in the file.
func (c *content) room() error {
	if c.extra < c.next {
		return nil
	}
	var st syscall.Statfs_t
	if err := syscall.Fstatfs(int(c.file.Fd()), &st); err != nil {
		return err
	}
	if int64(st.Bavail)*st.Bsize-roomStep < c.free {
		return syscall.ENOSPC
	}
	c.next = c.extra + roomStep
	return nil
}

// Write appends.
func (c *content) Write(p []byte) (int, error) {
	n := len(p)
	if c.file == nil {
		room := min(memoryBound-len(*c.mem), n)
		*c.mem = append(*c.mem, p[:room]...)
		if p = p[room:]; len(p) == 0 {
			return n, nil
		}
		f, err := os.CreateTemp(c.dir, "body-")
		if err != nil {
			return room, err
		}
		c.file, c.late = f, bufio.NewWriterSize(f, 64<<10)
		// Without a name nothing is left of it, however we end.
		if err := os.Remove(f.Name()); err != nil {
			return room, err
		}
	}
	if err := c.room(); err != nil {
		return n - len(p), err
	}
	m, err := c.late.Write(p)
	c.extra += int64(m)
	return n - len(p) + m, err
}

// finish ends the writing.
func (c *content) finish() error {
	if c.late == nil {
		return nil
	}
	err := c.late.Flush()
	c.late = nil
	return err
}

// Size is in octets.
func (c *content) Size() int64 { return int64(len(*c.mem)) + c.extra }

// ReadAt is io.ReaderAt's.
func (c *content) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, os.ErrInvalid
	}
	if len(p) == 0 {
		return 0, nil
	}
	if inMem := int64(len(*c.mem)); off < inMem {
		n = copy(p, (*c.mem)[off:])
		p, off = p[n:], inMem
		if len(p) == 0 {
			return n, nil
		}
	}
	if c.file == nil {
		return n, io.EOF
	}
	m, err := c.file.ReadAt(p, off-int64(len(*c.mem)))
	return n + m, err
}

func (c *content) release() {
	if c.mem != nil {
		if cap(*c.mem) <= 2*memoryBound {
			*c.mem = (*c.mem)[:0]
			memories.Put(c.mem)
		}
		c.mem = nil
	}
	if c.file != nil {
		_ = c.file.Close()
		c.file = nil
	}
}

// countReceived counts the Received fields of a header (RFC 5321 §6.3), reading it in blocks.
func countReceived(c io.ReaderAt, size int64) int {
	block := make([]byte, 4<<10)
	count, start := 0, true
	name := make([]byte, 0, len("received:"))
	lineLen := 0
	for off := int64(0); off < size; {
		n, err := c.ReadAt(block[:min(int64(len(block)), size-off)], off)
		if n == 0 && err != nil {
			return count
		}
		off += int64(n)
		for _, x := range block[:n] {
			switch x {
			case '\n':
				if lineLen == 0 {
					return count
				}
				start, lineLen, name = true, 0, name[:0]
			case '\r':
			default:
				lineLen++
				if start {
					name = append(name, x)
					if len(name) == cap(name) {
						if bytes.EqualFold(name, []byte("received:")) {
							count++
						}
						start = false
					}
				}
			}
		}
	}
	return count
}
