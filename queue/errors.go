package queue

import (
	"errors"
	"fmt"

	"mailproxy/mail"
	"mailproxy/spool"
)

var (
	// ErrFull: the spool's file system has no room, or less than Options.MinFree.
	ErrFull = spool.ErrFull
	// ErrSick: an earlier write to the spool could not be made durable, and none has succeeded since.
	ErrSick = errors.New("spool does not keep what is written")
	// ErrNoSuch: there is no item of that ID.
	ErrNoSuch = errors.New("no such item in the queue")
	// ErrBusy: the item is being tried just now.
	ErrBusy = errors.New("item is being tried just now")
	// ErrComing: that node has an order about the item under way, such as one that brings it there: it will be there, or will not.
	ErrComing = errors.New("another order about it is under way at that node just now")
	// ErrUnanswered: the item is not accepted yet: its client waits for an answer.
	ErrUnanswered = errors.New("its client has no answer yet")
	// ErrOnHold: an operator has the item wait.
	ErrOnHold = errors.New("item is on hold")
	// ErrOther: another item has this ID.
	ErrOther = errors.New("another item has this ID")
	// ErrRefused: the node that an item was to be given to has not taken it.
	ErrRefused = errors.New("refused")
	// ErrDeed: there is no such order.
	ErrDeed = errors.New("no such order")
	// ErrNoTransport: the configuration has no transport of that name.
	ErrNoTransport = errors.New("no such transport")
	// ErrDamaged: a record of the spool has a wrong checksum or shape.
	ErrDamaged = spool.ErrDamaged
)

// refusal is the reply for mail that could not be spooled.
func refusal(err error) *mail.Reply {
	if errors.Is(err, ErrFull) {
		return &mail.Reply{Code: 452, Enhanced: [3]int{4, 3, 1}, Text: "insufficient storage, try again later", Cause: err}
	}
	return &mail.Reply{Code: 451, Enhanced: [3]int{4, 3, 0}, Text: "local error, try again later", Cause: fmt.Errorf("spool: %w", err)}
}
