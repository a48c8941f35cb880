package smtpd

import (
	"errors"
	"strconv"
	"strings"
	"unicode/utf8"

	"mailproxy/mail"
)

// A command is what MAIL or RCPT says.
type command struct {
	path     mail.Path
	size     int64 // of SIZE=; 0 where it was not said
	eightBit bool
	utf8     bool
	ret      mail.Return
	envID    string
	params   mail.RcptParams
}

// splitVerb gives a line's verb in upper case and what stands behind it. The line is without its CRLF.
func splitVerb(line string) (verb, rest string) {
	verb, rest, _ = strings.Cut(strings.TrimRight(line, " \t"), " ")
	return strings.ToUpper(verb), strings.TrimLeft(rest, " \t")
}

// isForeign knows what other protocols begin with, and what a message's text does: a browser or a script that was led here, and
// whoever is out of step, must not have what follows run as commands.
func isForeign(verb, rest string) bool {
	switch verb {
	case "GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "PRI", "PROXY":
		return true
	}
	last := rest[strings.LastIndexByte(rest, ' ')+1:]
	return strings.HasPrefix(verb, "SSH-") || strings.HasSuffix(verb, ":") || !isASCII(verb) || strings.HasPrefix(last, "HTTP/")
}

func isASCII(s string) bool {
	return strings.IndexFunc(s, func(r rune) bool { return r >= utf8.RuneSelf }) < 0
}

// parseMail reads what stands behind MAIL: FROM:<path> and parameters.
func parseMail(rest string) (cmd command, refused *mail.Reply) {
	path, params, ok := splitPath(rest, "FROM:")
	if !ok {
		return cmd, replySyntax
	}
	for params != "" {
		var param string
		param, params, _ = strings.Cut(params, " ")
		if param == "" {
			continue
		}
		key, value, has := strings.Cut(param, "=")
		switch strings.ToUpper(key) {
		case "SIZE":
			n, err := strconv.ParseUint(value, 10, 63) // RFC 1870 §4: up to 20 digits
			if err != nil {
				return cmd, replySyntax
			}
			cmd.size = int64(n)
		case "BODY":
			switch strings.ToUpper(value) {
			case "8BITMIME":
				cmd.eightBit = true
			case "7BIT":
			default:
				return cmd, replySyntax
			}
		case "SMTPUTF8":
			if has {
				return cmd, replySyntax
			}
			cmd.utf8 = true
		case "RET", "ENVID":
			if err := cmd.mailDSN(strings.ToUpper(key), value); err != nil {
				return cmd, syntax(err)
			}
		default:
			return cmd, replyUnknownParameter // RFC 5321 §4.1.1.11
		}
	}
	var err error
	if cmd.path, err = mail.ParsePath(path); err != nil {
		return cmd, &mail.Reply{Code: replyBadSender.Code, Enhanced: replyBadSender.Enhanced, Text: replyBadSender.Text, Cause: err}
	}
	switch {
	case !cmd.path.IsASCII() && !cmd.utf8:
		return cmd, replyNeedsUTF8
	case cmd.path.Domain == "" && !cmd.path.IsNull():
		return cmd, replyBadSender // <postmaster> is a forward-path only
	}
	return cmd, nil
}

var errTwice = errors.New("parameter given twice")

// mailDSN takes a parameter of RFC 3461 with MAIL.
func (cmd *command) mailDSN(key, value string) (err error) {
	switch {
	case key == "RET" && cmd.ret == "":
		cmd.ret, err = mail.ParseReturn(value)
	case key == "ENVID" && cmd.envID == "":
		cmd.envID, err = mail.ParseEnvID(value)
	default:
		err = errTwice
	}
	return err
}

// rcptParams reads the parameters of RCPT, which are those of RFC 3461.
func (cmd *command) rcptParams(params string, smtputf8 bool) *mail.Reply {
	for param := range strings.FieldsFuncSeq(params, func(r rune) bool { return r == ' ' }) {
		key, value, _ := strings.Cut(param, "=")
		var err error
		switch key = strings.ToUpper(key); {
		case key == "NOTIFY" && cmd.params.Notify == 0:
			cmd.params.Notify, err = mail.ParseNotify(value)
		case key == "ORCPT" && cmd.params.Original == "":
			cmd.params.Original, err = mail.ParseOriginal(value, smtputf8)
		case key == "NOTIFY", key == "ORCPT":
			err = errTwice
		default:
			return replyUnknownParameter // RFC 5321 §4.1.1.11
		}
		if err != nil {
			return syntax(err)
		}
	}
	return nil
}

// syntax is replySyntax with what is wrong for the log.
func syntax(cause error) *mail.Reply {
	return &mail.Reply{Code: replySyntax.Code, Enhanced: replySyntax.Enhanced, Text: replySyntax.Text, Cause: cause}
}

// parseRcpt reads what stands behind RCPT: TO:<path> and parameters.
func parseRcpt(rest string, smtputf8 bool) (cmd command, refused *mail.Reply) {
	path, params, ok := splitPath(rest, "TO:")
	if !ok {
		return cmd, replySyntax
	}
	if refused := cmd.rcptParams(params, smtputf8); refused != nil {
		return cmd, refused
	}
	var err error
	if cmd.path, err = mail.ParsePath(path); err != nil {
		return cmd, &mail.Reply{Code: replyBadAddress.Code, Enhanced: replyBadAddress.Enhanced, Text: replyBadAddress.Text, Cause: err}
	}
	switch {
	case cmd.path.IsNull():
		return cmd, replyBadAddress
	case !cmd.path.IsASCII() && !smtputf8:
		return cmd, replyNeedsUTF8
	}
	return cmd, nil
}

// splitPath takes KEYWORD:<path> apart: the octets between the brackets as they stand on the wire, quoting and all, and the
// parameters behind.
func splitPath(s, keyword string) (path, params string, ok bool) {
	if len(s) < len(keyword) || !strings.EqualFold(s[:len(keyword)], keyword) || !utf8.ValidString(s) {
		return "", "", false
	}
	s = strings.TrimLeft(s[len(keyword):], " ") // a blank is seen in the wild
	if s == "" || s[0] != '<' {
		return "", "", false
	}
	quoted := false
	for i := 1; i < len(s); i++ {
		switch c := s[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case c == '>' && !quoted:
			path, params = s[1:i], s[i+1:]
			return path, params, params == "" || params[0] == ' '
		}
	}
	return "", "", false
}

// helloArgument checks what stands behind EHLO or HELO: one word, whatever it says (it proves nothing).
func helloArgument(rest string) (string, bool) {
	word, _, _ := strings.Cut(rest, " ")
	return word, word != "" && len(word) <= 255 && utf8.ValidString(word)
}
