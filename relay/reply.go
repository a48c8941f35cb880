package relay

import (
	"bufio"
	"errors"
	"fmt"
	"io"

	"mailproxy/mail"
)

// Bounds on a reply. RFC 5321 §4.5.3.1.5 has 512 octets a line; real hosts send more.
const (
	maxReplyLine  = 2048 // octets, with its line end
	maxReplyLines = 100
	maxReplyText  = 4096 // octets of text kept; the rest is read and dropped
)

// protocolError is a reply that is none; it wraps ErrProtocol.
type protocolError string

func (e protocolError) Error() string        { return "protocol error: " + string(e) }
func (e protocolError) Is(target error) bool { return target == ErrProtocol }

// readLine reads one line of a reply, without its line end. It is valid until the next read.
func readLine(r *bufio.Reader) ([]byte, error) {
	line, err := r.ReadSlice('\n')
	switch {
	case errors.Is(err, bufio.ErrBufferFull) || len(line) > maxReplyLine:
		return nil, protocolError("reply line over 2048 octets")
	case err == io.EOF && len(line) > 0:
		return nil, io.ErrUnexpectedEOF
	case err != nil:
		return nil, err
	}
	line = line[:len(line)-1]
	if n := len(line); n > 0 && line[n-1] == '\r' {
		line = line[:n-1]
	}
	return line, nil
}

// splitLine gives the code of a reply line, its text, and whether more lines follow.
func splitLine(line []byte) (code int, text []byte, more bool, err error) {
	if len(line) < 3 {
		return 0, nil, false, protocolError(fmt.Sprintf("reply %q", line))
	}
	a, b, c := line[0]-'0', line[1]-'0', line[2]-'0'
	if a < 2 || a > 5 || b > 9 || c > 9 || len(line) > 3 && line[3] != ' ' && line[3] != '-' {
		return 0, nil, false, protocolError(fmt.Sprintf("reply %.80q", line))
	}
	code = int(a)*100 + int(b)*10 + int(c)
	if len(line) == 3 {
		return code, nil, false, nil
	}
	return code, line[4:], line[3] == '-', nil
}

// readReply reads one whole reply (RFC 5321 §4.2). The error wraps ErrProtocol where what came is no reply, else it is the
// reader's.
func readReply(r *bufio.Reader) (*mail.Reply, error) {
	line, err := readLine(r)
	if err != nil {
		return nil, err
	}
	return readRest(r, line)
}

// readRest reads the reply whose first line is given.
func readRest(r *bufio.Reader, line []byte) (*mail.Reply, error) {
	code, text, more, err := splitLine(line)
	if err != nil {
		return nil, err
	}
	reply := &mail.Reply{Code: code}
	reply.Enhanced, text = splitEnhanced(code, text)
	if !more {
		reply.Text = string(appendClean(make([]byte, 0, len(text)), text))
		return reply, nil
	}
	all := appendClean(nil, text)
	for n := 1; more; n++ {
		if n == maxReplyLines {
			return nil, protocolError("reply over 100 lines")
		}
		line, err = readLine(r)
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return nil, err
		}
		var next int
		next, text, more, err = splitLine(line)
		if err != nil {
			return nil, err
		}
		if next != code {
			return nil, protocolError("reply with two codes")
		}
		if len(all)+len(text)+1 <= maxReplyText {
			_, text = splitEnhanced(code, text)
			all = appendClean(append(all, '\n'), text)
		}
	}
	reply.Text = string(all)
	return reply, nil
}

// splitEnhanced takes the status code of RFC 3463 from the front of a reply's text, where there is one of the code's class.
func splitEnhanced(code int, text []byte) (e [3]int, rest []byte) {
	i := 0
	for part := range e {
		start, v := i, 0
		for i < len(text) && i-start < 3 && text[i] >= '0' && text[i] <= '9' {
			v = v*10 + int(text[i]-'0')
			i++
		}
		if i == start || part < 2 && (i == len(text) || text[i] != '.') {
			return [3]int{}, text
		}
		e[part] = v
		if part < 2 {
			i++
		}
	}
	if e[0] != code/100 || i < len(text) && text[i] != ' ' {
		return [3]int{}, text
	}
	if i < len(text) {
		i++
	}
	return e, text[i:]
}

// appendClean appends text with all that is not printable ASCII as '?': it goes to logs, DSNs and other hosts' screens.
func appendClean(dst, text []byte) []byte {
	for _, c := range text {
		if c == '\t' {
			c = ' '
		}
		if c < ' ' || c > '~' {
			c = '?'
		}
		dst = append(dst, c)
	}
	return dst
}

// passedOn is the reply as a client of ours may see it: 421 says that the hop closes its connection, which is not ours to
// say, so it becomes 451.
func passedOn(r *mail.Reply) *mail.Reply {
	if r.Code != 421 {
		return r
	}
	return &mail.Reply{Code: 451, Enhanced: r.Enhanced, Text: r.Text, Cause: r}
}

// nonsense is the temporary reply for a hop that does not speak SMTP.
func nonsense(cause error) *mail.Reply {
	return &mail.Reply{Code: 451, Enhanced: [3]int{4, 5, 0}, Text: "next hop gave no valid reply", Cause: cause}
}

// lost is the temporary reply for a connection that ended inside a transaction.
func lost(cause error) *mail.Reply {
	return &mail.Reply{
		Code: 451, Enhanced: [3]int{4, 4, 2}, Text: "connection to the next hop lost", Cause: fmt.Errorf("%w: %w", ErrLost, cause),
	}
}
