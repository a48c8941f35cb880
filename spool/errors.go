package spool

import (
	"errors"
	"fmt"
	"syscall"
)

var (
	// ErrFull: the spool's file system has no room, or less than is to be kept free.
	ErrFull = errors.New("spool is full")
	// ErrNoSuch: there is no message of that ID.
	ErrNoSuch = errors.New("no such message in the spool")
	// ErrDamaged: a record has a wrong checksum or shape.
	ErrDamaged = errors.New("damaged record in the spool")
	// ErrClosed: Close was called.
	ErrClosed = errors.New("spool is closed")
)

// A DamagedError says what is wrong with a record; it wraps ErrDamaged.
type DamagedError string

func (e DamagedError) Error() string { return "damaged: " + string(e) }

// Is makes it an ErrDamaged.
func (e DamagedError) Is(target error) bool { return target == ErrDamaged }

// A ContentError is an error of what is to be written: the spool has no part in it.
type ContentError struct{ Err error }

func (e *ContentError) Error() string { return "content: " + e.Err.Error() }
func (e *ContentError) Unwrap() error { return e.Err }

// full gives ErrFull for what the kernel says when there is no room.
func full(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%w: %w", ErrFull, err)
	}
	return err
}
